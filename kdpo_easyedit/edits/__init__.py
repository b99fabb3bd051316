"""Edits as a file: save, apply, revert; what is in it; and as an adapter for others to load."""

from .file import EditsError, apply_edits, edits_applied, read_header, remove_edit, revert_edits, save_edits

__all__ = ["EditsError", "apply_edits", "edits_applied", "read_header", "remove_edit", "revert_edits", "save_edits"]
