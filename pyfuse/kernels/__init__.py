"""The Triton kernels. Their files are in the repository's folder kernels/, which installs as this package."""
