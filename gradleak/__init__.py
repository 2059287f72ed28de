"""gradleak: what a shared gradient gives away."""
