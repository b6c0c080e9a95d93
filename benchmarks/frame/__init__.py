"""The frame of the drivers: cells, a store of results, engines that run them, tables that query them."""
