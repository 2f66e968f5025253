"""Everything that comes over the network: files by HTTP, releases of the package index, repositories of the hub, and the base models among them."""
