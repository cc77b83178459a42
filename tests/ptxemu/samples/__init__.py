"""Kernels that the emulator is tried on: small ones of known behaviour and whole attention kernels."""
