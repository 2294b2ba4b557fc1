"""Rows and calls between hosts: a worker that was told to listens on TCP; who knows its secret fetches from it."""
