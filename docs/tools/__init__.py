"""Programs that write parts of the documentation or help MkDocs to build it."""
