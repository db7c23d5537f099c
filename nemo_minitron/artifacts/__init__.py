"""Published stage outputs: manifests, fingerprints, locks."""
