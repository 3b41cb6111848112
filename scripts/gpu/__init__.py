"""The checks behind scripts/gpu_check.py; they use public parts of miniserve, and tests/tiny.py for models."""
