"""The vocabularies and prompt templates that ship with the package, and the reader of a user's own files."""
