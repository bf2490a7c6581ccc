"""The ground floor of everything on disk: atomic writing, locks, safetensors."""
