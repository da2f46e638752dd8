# The swarm's sockets: connect from one of many loopback addresses, receive with the kernel's time stamp.

from libc.stdint cimport uint8_t, uint16_t, uint64_t

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>

    #ifndef IP_BIND_ADDRESS_NO_PORT
    #define IP_BIND_ADDRESS_NO_PORT 24
    #endif
    #ifndef SO_TIMESTAMPNS
    #define SO_TIMESTAMPNS 35
    #endif
    #define PRESENCE_STAMPED 1
    #define PRESENCE_UNREAD 2
    /* Of a socket that nobody reads. The kernel keeps far more for one of the loopback device, whose segments have 64 KiB,
       than for one across a network: as many bytes as a megabyte and more would have to be sent before it is full. */
    #define UNREAD_BYTES 4096
    #define UNREAD_SEGMENT_BYTES 1400

    static inline int presence_dial(int fd, unsigned source, uint16_t port, int flags) {
        struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET};
        int one = 1, bytes = UNREAD_BYTES, segment_bytes = UNREAD_SEGMENT_BYTES;
        /* The port is chosen in connect(2), where it need only be free for that peer. */
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (flags & PRESENCE_STAMPED)
            setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof one);
        if (flags & PRESENCE_UNREAD) {
            setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
            setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment_bytes, sizeof segment_bytes);
        }
        from.sin_addr.s_addr = htonl(0x7f000101u + source);  /* 127.0.1.1 and on */
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        to.sin_port = htons(port);
        if (bind(fd, (struct sockaddr *) &from, sizeof from) < 0)
            return -1;
        return connect(fd, (struct sockaddr *) &to, sizeof to) < 0 && errno != EINPROGRESS ? -1 : 0;
    }

    /* A connected or connecting socket, or -errno. */
    static inline int presence_start_connect(unsigned source, uint16_t port, int flags) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), error;
        if (fd < 0)
            return -errno;
        if (presence_dial(fd, source, port, flags) < 0) {
            error = errno;
            close(fd);
            return -error;
        }
        return fd;
    }

    static inline int presence_socket_error(int fd) {
        int error = 0;
        socklen_t size = sizeof error;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0 ? errno : error;
    }

    /* As recv(2), and when the last of the bytes arrived (CLOCK_REALTIME, ns; 0: unknown). */
    static inline ssize_t presence_receive_stamped(int fd, void *buffer, size_t size, uint64_t *stamp_ns) {
        union { char bytes[128]; struct cmsghdr header; } control;
        struct iovec place = {buffer, size};
        struct msghdr message = {
            .msg_iov = &place, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes
        };
        ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
        struct cmsghdr *c;
        struct timespec at;
        if (got > 0)
            for (c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c))
                if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SO_TIMESTAMPNS) {
                    memcpy(&at, CMSG_DATA(c), sizeof at);
                    *stamp_ns = (uint64_t) at.tv_sec * 1000000000u + (uint64_t) at.tv_nsec;
                }
        return got;
    }

    static inline size_t presence_upgrade_request(uint8_t *out, size_t size, uint16_t port) {
        int length = snprintf((char *) out, size,
            "GET /ws HTTP/1.1\\r\\nHost: 127.0.0.1:%u\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\nSec-WebSocket-Version: 13\\r\\n\\r\\n", (unsigned) port);
        return length > 0 && (size_t) length < size ? (size_t) length : 0;
    }

    static inline uint64_t presence_clock_offset(void) {
        struct timespec real, monotonic;
        clock_gettime(CLOCK_MONOTONIC, &monotonic);
        clock_gettime(CLOCK_REALTIME, &real);
        return (uint64_t) (real.tv_sec - monotonic.tv_sec) * 1000000000u + (uint64_t) (real.tv_nsec - monotonic.tv_nsec);
    }
    """
    enum:
        SOCKET_STAMPED "PRESENCE_STAMPED"  # arrivals come with the kernel's time stamp
        SOCKET_UNREAD "PRESENCE_UNREAD"    # soon full
    int start_connect "presence_start_connect"(unsigned int source, uint16_t port, int flags) noexcept nogil
    int socket_error "presence_socket_error"(int fd) noexcept nogil
    ssize_t receive_stamped "presence_receive_stamped"(
        int fd, void *buffer, size_t size, uint64_t *stamp_ns
    ) noexcept nogil
    size_t upgrade_request "presence_upgrade_request"(uint8_t *out, size_t size, uint16_t port) noexcept nogil
    uint64_t clock_offset_ns "presence_clock_offset"() noexcept nogil
