"""What a student is worth: features, distances, and the protocol that a number was measured on."""
