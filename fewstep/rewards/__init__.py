"""Rewards: objects that score a sample and say which way is better."""
