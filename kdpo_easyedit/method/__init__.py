"""The method: KDPO and KDPO+C. Knows nothing of EasyEdit, benchmark files or tables."""
