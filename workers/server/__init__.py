"""Between an engine and its gateways: the server's loop, messages, and requests whose gateway was lost."""
