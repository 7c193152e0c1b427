"""Testis ultrasound: non-obstructive against obstructive azoospermia."""
