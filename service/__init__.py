"""The gRPC server, and the engine that it shares with the command line."""
