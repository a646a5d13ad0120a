"""Where everything lies: structures located, tables, stored refcounts, counters of clusters."""
