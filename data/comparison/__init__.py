"""What training data look like, and recorded episodes held against a policy."""
