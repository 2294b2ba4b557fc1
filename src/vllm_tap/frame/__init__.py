"""Forms of what crosses between worker and client: messages, and the layout of a block in memory."""
