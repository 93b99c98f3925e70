"""The viewer of a folder of results: a server on this machine alone, and the page that it serves."""
