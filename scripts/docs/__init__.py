"""The static site: pages written from the registry, and the build."""
