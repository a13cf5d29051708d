/* Counts this process's calls of MPI's collectives and of what makes a communicator, by the ranks that take part.
 *
 * Load it before libmpi, with global symbols: the program's calls come here and are passed on through MPI's profiling
 * interface. Calls that MPI makes inside itself are not counted. */
#include <mpi.h>

static long all_ranks, fewer_ranks, communicators;

static void count_collective(MPI_Comm comm) {
    int size, world;
    PMPI_Comm_size(comm, &size);
    PMPI_Comm_size(MPI_COMM_WORLD, &world);
    *(size == world ? &all_ranks : &fewer_ranks) += 1;
}

/* Collectives over all ranks, over fewer, and communicators made so far, each of them new even if freed since. */
void mpi_calls(long counts[3]) {
    counts[0] = all_ranks, counts[1] = fewer_ranks, counts[2] = communicators;
}

#define COLLECTIVE(name, parameters, arguments)      \
    int MPI_##name parameters {                      \
        count_collective(comm);                      \
        return PMPI_##name arguments;                \
    }
#define MAKES_COMM(name, parameters, arguments)      \
    int MPI_##name parameters {                      \
        count_collective(comm);                      \
        communicators += 1;                          \
        return PMPI_##name arguments;                \
    }

#define IN const void *in
#define OUT void *out
#define TYPE MPI_Datatype
#define COUNTS const int counts[], const int places[]
COLLECTIVE(Barrier, (MPI_Comm comm), (comm))
COLLECTIVE(Ibarrier, (MPI_Comm comm, MPI_Request *r), (comm, r))
COLLECTIVE(Bcast, (OUT, int n, TYPE t, int root, MPI_Comm comm), (out, n, t, root, comm))
COLLECTIVE(Reduce, (IN, OUT, int n, TYPE t, MPI_Op op, int root, MPI_Comm comm), (in, out, n, t, op, root, comm))
COLLECTIVE(Allreduce, (IN, OUT, int n, TYPE t, MPI_Op op, MPI_Comm comm), (in, out, n, t, op, comm))
COLLECTIVE(Iallreduce, (IN, OUT, int n, TYPE t, MPI_Op op, MPI_Comm comm, MPI_Request *r), (in, out, n, t, op, comm, r))
COLLECTIVE(Gather, (IN, int n, TYPE t, OUT, int m, TYPE u, int root, MPI_Comm comm), (in, n, t, out, m, u, root, comm))
COLLECTIVE(Gatherv, (IN, int n, TYPE t, OUT, COUNTS, TYPE u, int root, MPI_Comm comm),
           (in, n, t, out, counts, places, u, root, comm))
COLLECTIVE(Scatter, (IN, int n, TYPE t, OUT, int m, TYPE u, int root, MPI_Comm comm), (in, n, t, out, m, u, root, comm))
COLLECTIVE(Scatterv, (IN, COUNTS, TYPE t, OUT, int n, TYPE u, int root, MPI_Comm comm),
           (in, counts, places, t, out, n, u, root, comm))
COLLECTIVE(Allgather, (IN, int n, TYPE t, OUT, int m, TYPE u, MPI_Comm comm), (in, n, t, out, m, u, comm))
COLLECTIVE(Allgatherv, (IN, int n, TYPE t, OUT, COUNTS, TYPE u, MPI_Comm comm), (in, n, t, out, counts, places, u, comm))
COLLECTIVE(Alltoall, (IN, int n, TYPE t, OUT, int m, TYPE u, MPI_Comm comm), (in, n, t, out, m, u, comm))
COLLECTIVE(Win_allocate_shared, (MPI_Aint n, int unit, MPI_Info info, MPI_Comm comm, void *base, MPI_Win *window),
           (n, unit, info, comm, base, window))
MAKES_COMM(Comm_dup, (MPI_Comm comm, MPI_Comm *made), (comm, made))
MAKES_COMM(Comm_split, (MPI_Comm comm, int color, int key, MPI_Comm *made), (comm, color, key, made))
MAKES_COMM(Comm_split_type, (MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm *made),
           (comm, type, key, info, made))

int MPI_Comm_create_group(MPI_Comm comm, MPI_Group group, int tag, MPI_Comm *made) {
    int size, world;
    PMPI_Group_size(group, &size);
    PMPI_Comm_size(MPI_COMM_WORLD, &world);
    *(size == world ? &all_ranks : &fewer_ranks) += 1;
    communicators += 1;
    return PMPI_Comm_create_group(comm, group, tag, made);
}
