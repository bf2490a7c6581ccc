"""Other libraries on our operations; each is imported when it is used."""
