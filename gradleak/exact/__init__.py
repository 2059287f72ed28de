"""What linear algebra reads off an update: pure functions on tensors."""
