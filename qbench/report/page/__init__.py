"""The report as one page: `content` is what stands on it, `render` makes the file."""
