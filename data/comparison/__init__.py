"""What training data look like, and what differs from them in what a robot sends."""
