"""The bundled hooks. They have no private door: they import only `indexer`, as yours do."""
