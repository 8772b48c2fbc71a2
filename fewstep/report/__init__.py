"""What a run leaves behind for a person to look at."""
