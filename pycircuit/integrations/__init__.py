"""Integrations with other libraries. Each module imports its library on use; its error names the package to install."""
