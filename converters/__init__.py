"""Readers and writers of foreign checkpoint formats, one per file."""
