"""What a model is, found by running and tracing it: chains of layers, head, first layer, rank."""
