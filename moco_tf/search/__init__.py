"""Finds images in a folder: look-alikes, near-duplicates, odd ones. A command a file; docs/search.md."""
