"""Adapters, one file or folder per host: import the one you need by name; nothing here imports a host."""
