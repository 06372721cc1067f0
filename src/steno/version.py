"""The version, apart from everything that takes long to import."""

VERSION = "0.1.0"
