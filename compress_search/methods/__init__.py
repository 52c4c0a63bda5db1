"""Compression methods, one technique a file, listed here."""
