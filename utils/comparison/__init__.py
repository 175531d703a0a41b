"""What differs between what a robot sends and what a policy was trained on."""
