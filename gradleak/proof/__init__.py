"""What an update alone proves about a reconstruction."""
