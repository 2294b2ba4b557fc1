"""What crosses between worker and client: messages on the control channel, and the layout of a block in memory."""
