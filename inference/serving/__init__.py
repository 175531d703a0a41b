"""A policy as a server and as a folder to share."""
