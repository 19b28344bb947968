"""The runs of a folder as a page that lives: a small web server on this machine, for this machine."""
