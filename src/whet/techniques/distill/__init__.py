"""Training, from labels or from a teacher."""
