"""Other libraries' names, signatures and meaning, on pyfuse's operations and so on every device."""
