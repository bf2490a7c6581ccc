"""Files on disk: safetensors, positioned reads, atomic writing, the cache folder, memory maps, sizes such as "8GiB"."""
