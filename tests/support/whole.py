"""What always holds of a pool's books."""

from miniserve.kv.host import HostPool
from miniserve.kv.pages import PagePool


def check_pool(pool: PagePool) -> None:
    """A page is lost, doubled or miscounted, or the order contradicts itself, or between admissions a slot of host
    memory is pinned: AssertionError. Linear in the pool."""
    free, order = set(pool._free), pool._order
    assert len(free) == len(pool._free)
    for page in range(pool.num_pages):
        assert not (page in free and page in order._group_of)
        unused = page in free or page in order._group_of
        assert (pool._refs[page] == 0) == unused, f"page {page} has {pool._refs[page]} references"
    assert pool.num_free + pool.num_cached + pool.num_held == pool.num_pages
    assert all(pool._hash_of[page] == digest for digest, page in pool._page_of.items())
    parents = [pool._parent_of[page] for page in pool._page_of.values()]
    assert pool._children == {parent: parents.count(parent) for parent in parents if parent is not None}
    groups = [*order._groups.values(), order._aside]
    assert {page: id(group) for group in groups for page in group.pages} == {
        page: id(group) for page, group in order._group_of.items()
    }
    assert sum(len(group.pages) for group in groups) == len(order)
    assert all(group.pages and group.name == name for name, group in order._groups.items())
    assert not isinstance(pool, HostPool) or pool.num_held == 0
