"""Serving experts: a gateway that chooses the expert of each request to another server."""
