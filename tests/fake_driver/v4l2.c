/* A camera for OpenCV's V4L2 code: load this by LD_PRELOAD, and open any file of SIZE bytes below /dev.

   Each frame is what the file contains. The driver says that it was captured at FAKE_TIMESTAMP_US, in microseconds. */

#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 48, SIZE = 3 * WIDTH * HEIGHT };

static void tell_format(struct v4l2_pix_format *format)
{
    format->width = WIDTH;
    format->height = HEIGHT;
    format->pixelformat = V4L2_PIX_FMT_BGR24;
    format->bytesperline = 3 * WIDTH;
    format->sizeimage = SIZE;
}

static void give_frame(struct v4l2_buffer *buffer)
{
    long long microseconds = atoll(getenv("FAKE_TIMESTAMP_US"));
    buffer->index = 0;
    buffer->bytesused = buffer->length = SIZE;
    buffer->timestamp.tv_sec = microseconds / 1000000;
    buffer->timestamp.tv_usec = microseconds % 1000000;
}

int ioctl(int file, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *value = va_arg(arguments, void *);
    va_end(arguments);
    if (_IOC_TYPE(request) != 'V')
        return syscall(SYS_ioctl, file, request, value);
    switch (request) {
    case VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)value)->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        break;
    case VIDIOC_G_FMT:
    case VIDIOC_S_FMT:
        tell_format(&((struct v4l2_format *)value)->fmt.pix);
        break;
    case VIDIOC_G_PARM:
        ((struct v4l2_streamparm *)value)->parm.capture.timeperframe = (struct v4l2_fract){1, 30};
        break;
    case VIDIOC_QUERYBUF:
        ((struct v4l2_buffer *)value)->length = SIZE; /* at offset 0, all of them */
        break;
    case VIDIOC_DQBUF:
        give_frame(value);
    }
    return 0;
}
