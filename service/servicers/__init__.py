"""gRPC adapters, one for each service of the API: parse, ask, format. No model, index or threshold logic."""
