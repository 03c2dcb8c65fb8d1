"""Finds images in a folder: look-alikes, near-duplicates, odd ones. Each command has its own file; docs/search.md."""
