"""What a student is worth: features, distances, and the protocol that a number was measured on."""

TEACHER_STEPS = 28  # at which a teacher is shown and measured, in a run's pictures, an evaluation and the comparison alike
