"""Grade of a solid renal mass on contrast-enhanced ultrasound (RepVGG)."""
