"""The model that is loaded where none is named; apart, so that a help text can name it without importing torch."""

DEFAULT_MODEL = "smollm2-135m"
