/* The floor: a loop over send(2), with no protocol but a canned 101. One room of all sockets, nothing else.
 *
 * A socket is asked for its upgrade request when it is accepted. A masked text frame "EVENTS BURST" on any of them
 * sends EVENTS frames to every socket, one send(2) each; a full socket is waited for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SOCKETS_MAX = 20000, PAYLOAD_BYTES = 190, FRAME_BYTES = 4 + PAYLOAD_BYTES };

static const char UPGRADED[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
static int sockets[SOCKETS_MAX];
static int count;

static void send_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno != EAGAIN) return;
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, -1);
            continue;
        }
        data += sent;
        size -= (size_t)sent;
    }
}

static void fan_out(int events) {
    char frame[FRAME_BYTES] = {(char)0x81, 126, 0, (char)PAYLOAD_BYTES};
    memset(frame + 4, 'x', PAYLOAD_BYTES);
    for (int event = 0; event < events; event++)
        for (int i = 0; i < count; i++) send_all(sockets[i], frame, FRAME_BYTES);
}

static void on_data(int fd) {
    char data[4096];
    ssize_t size = recv(fd, data, sizeof data - 1, 0);
    if (size <= 0) {
        close(fd);
        return;
    }
    data[size] = 0;
    if (data[0] == 'G') {
        send_all(fd, UPGRADED, sizeof UPGRADED - 1);
        sockets[count++] = fd;
    } else if ((uint8_t)data[0] == 0x81) {
        for (int i = 6; i < size; i++) data[i] ^= data[2 + (i - 6) % 4]; /* the mask is in front of the payload */
        fan_out(atoi(data + 6));
    }
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int on = 1; /* as the others have it: Nagle's algorithm would join frames at the price of their delay */
    int listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[128];
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) return 1;
    getsockname(listener, (struct sockaddr *)&address, &length);
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    printf("listening on %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int ready = epoll_wait(epoll, events, 128, -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd != listener) {
                on_data(events[i].data.fd);
                continue;
            }
            event.data.fd = accept(listener, NULL, NULL);
            if (event.data.fd < 0) continue;
            setsockopt(event.data.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            epoll_ctl(epoll, EPOLL_CTL_ADD, event.data.fd, &event);
        }
    }
}
