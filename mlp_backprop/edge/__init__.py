"""What a caller may pass, and what stands around every call."""
